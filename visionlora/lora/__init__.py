"""The LoRA core: layers, targets, injection, exact merge. It needs torch alone and knows no model family by import."""
