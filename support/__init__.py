"""What the scripts share and no lesson leads through: command line, ranks, hardware, optimizers, files, training state.

Nothing here imports anything else of the project.
"""
