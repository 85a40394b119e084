"""Networks that measure images or train the tokenizer: published ones, whose tensors have the names of their files, the
losses that use them, and the classifier that replaces Inception on embedded images."""
