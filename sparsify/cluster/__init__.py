"""A pruning run as a graph of tasks, and who does them: this process, processes of this machine, or Ray's."""
