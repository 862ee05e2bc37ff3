"""Structure to images: specimens, imaging physics, camera, training examples, the twin."""
