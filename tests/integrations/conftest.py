import pytest


@pytest.fixture(scope="session")
def stories(data_folder, tmp_path_factory):
    """stories260K as a Hugging Face directory."""
    pytest.importorskip("transformers")
    from resu.experiments.llama2c import write_hf_directory

    return write_hf_directory(data_folder("model_stories260K"), tmp_path_factory.mktemp("hf") / "stories")


@pytest.fixture(scope="session")
def texts(stories, tmp_path_factory):
    """What the model tells itself: sampled stories to calibrate on, others, greedy after eight tokens, to evaluate."""
    from resu.experiments.stories import write_stories
    from resu.integrations.hf import load_model

    folder = tmp_path_factory.mktemp("texts")
    model, tokenizer = load_model(stories)
    return (
        write_stories(model, tokenizer, folder / "calibration.jsonl", count=64, tokens=128, seed=0),
        write_stories(model, tokenizer, folder / "evaluation.jsonl", count=24, tokens=200, sampled=8, seed=1),
    )
