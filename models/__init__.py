"""What is run: checkpoints become graphs of modules, modules become stages, stages become engines."""
