"""What all scripts share: command line, ranks, hardware, optimizers, files, training state. The method can be
understood without reading it.

Nothing here imports anything else of the project.
"""
