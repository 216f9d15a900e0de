"""The lab's texts, tasks, models and metrics."""
