"""Writers of deployable artifacts. An exporter reads a pruned checkpoint and never opens a runtime."""
