"""Federated methods, one file each with both halves. Built-ins come in by the same door as plug-ins: entry points."""
