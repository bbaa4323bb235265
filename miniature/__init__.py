"""The paper in miniature: a closed world, its judge, and a base model trained in minutes."""
