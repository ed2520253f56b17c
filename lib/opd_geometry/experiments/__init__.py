"""Which runs there are, made and measured so that they can be made again."""
