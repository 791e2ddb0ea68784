"""Many clients on one machine, the comparison with central and local training, benchmarks, and the command line."""
