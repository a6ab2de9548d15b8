"""Recipes to copy and edit: one YAML file per model family and task."""

if __name__ == "configs":
    raise ImportError("this folder is installed as `visionlora.configs`; import it under that name")
