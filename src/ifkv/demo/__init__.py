"""What the demo needs: a small real model and texts of its own."""
