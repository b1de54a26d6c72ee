"""Fine-tuning of Hugging Face directories in little memory; see :func:`resu.integrations.finetune.run.finetune`."""
