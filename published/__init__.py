"""Networks that others published, under the names of their tensors, and the loading of their files."""
