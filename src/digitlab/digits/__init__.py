"""New images: decoded, prepared as MNIST was, predicted and explained."""
