"""fedtune: federated fine-tuning of language models. What both sides share; imports neither torch nor flwr by itself."""

__version__ = "0.1.0"
