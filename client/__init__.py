"""The node: a thin relay to Flower (app) and the resident trainer that holds model and data."""
