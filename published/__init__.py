"""Networks that measure images or teach the tokenizer: those that others published, under the names of their tensors,
the losses made of them, and the classifier that takes Inception's place on the digits."""
