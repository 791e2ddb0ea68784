"""The coordinator: the round loop, the gate, the spool and the run folder."""
