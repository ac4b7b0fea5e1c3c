"""Training: the story of a distillation (distill.py), the loop (trainer.py), and what they work with."""
