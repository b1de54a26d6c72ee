"""The networks known by name, built for a data set: ``networks["resnet20"].build(data)``."""

from resu.experiments.networks.registry import Network, networks

__all__ = ["Network", "networks"]
