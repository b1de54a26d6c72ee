"""Fine-tuning real pretrained models in every way there is: accuracy against measured memory.

``python -m resu.experiments.finetuning`` runs the grid and draws the front.
"""
