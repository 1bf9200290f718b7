"""What is learned and measured: data, splits, label spaces and the metric of each task."""
