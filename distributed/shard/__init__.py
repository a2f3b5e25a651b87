"""The generic cut: any mlx-lm model as one stage of a pipeline. Start reading at stage_model.py."""
