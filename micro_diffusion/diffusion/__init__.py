"""The mathematics: objectives, samplers, guidance. Functions of tensors, no modules."""
