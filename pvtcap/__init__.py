"""pvtcap: train and evaluate image captioners on WebDataset shards, on one CPU or many GPU nodes."""

__version__ = "0.1.0"
__all__ = ["__version__"]
