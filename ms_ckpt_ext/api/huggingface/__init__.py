"""Hugging Face's names: what comes from there, and what goes back.

families  weight rules of a family of models, or of a rule file
adapters  LoRA adapters that are added to a model's weights
export    a training's weights for Hugging Face's libraries
"""
