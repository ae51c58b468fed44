"""BACKBONES: configuration and modeling files, one folder a model."""
