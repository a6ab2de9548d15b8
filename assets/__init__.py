"""Embedded base models, picture sets and adapters, and the scripts that build them."""

if __name__ == "assets":
    raise ImportError("this folder is installed as `visionlora.assets`; import it under that name")
