"""The story of the project: one file is one arrow from inputs on disk to outputs on disk."""

if __name__ == "pipelines":
    raise ImportError("this folder is installed as `visionlora.pipelines`; import it under that name")
