"""SwiftKV on Ray: distill, publish, serve and meter. Import from the module that defines a thing."""

__version__ = "0.1.0"
