"""A request becomes a video: model adapters, the hook, the attention processor, pipelines and video files."""
