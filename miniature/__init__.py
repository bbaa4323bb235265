"""The paper in miniature: a closed world, its judge, a base model made on the spot."""
