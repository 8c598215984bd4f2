"""What a user can set: the cluster file as one pydantic model, where each value came from, and the environment.

model.py says which options there are, source.py reads them (file, --set, flags) so that every error names key and line,
environment.py is the only reader of environment variables in this project.
"""

from cluster.config.model import ClusterConfig, PoolConfig, RouterConfig
from cluster.config.source import ConfigError, Sources, load_config

__all__ = ["ClusterConfig", "ConfigError", "PoolConfig", "RouterConfig", "Sources", "load_config"]
