"""The mathematics: noise, objectives, samplers, guidance. Functions of tensors, no modules."""
