"""`neap serve ORGANISATION/NAME`: fetched from a hub, in Paddle's layout, with a SentencePiece tokenizer, served."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import openai
import pytest
from safetensors.torch import load_file, save_file

from engine.text.sentencepiece_model import parse_sentencepiece
from engine.tiny.random_checkpoint import make_random_checkpoint
from tests.engine.models import hub_server
from tests.engine.models.test_paddle_layout import to_paddle
from tests.engine.text.sentencepiece_corpus import train, write_tokenizer
from tests.integration.test_serve import serving

ID = "neap-tests/ERNIE-tiny-Paddle"


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """What a -Paddle release holds: no tokenizer.json, fused and transposed weights."""
    model = train()
    source = make_random_checkpoint(tmp_path / "PT", vocab_size=len(parse_sentencepiece(model).pieces))
    path = tmp_path / "Paddle"
    path.mkdir()
    save_file(to_paddle(load_file(source / "model.safetensors")), path / "model.safetensors")
    shutil.copy(source / "config.json", path)
    write_tokenizer(path, model)
    return path


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_paddle_model_of_the_hub_is_served(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_server.serving({ID: repo}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        with serving(tmp_path, ID, "--backend", "process") as server:
            server.wait_until_ready()
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60) as client:
                assert [model.id for model in client.models.list()] == [ID]
                options = {"temperature": 0.0, "max_tokens": 24}
                question = [{"role": "user", "content": "你好，the quick 🎉"}]  # noqa: RUF001
                whole = client.chat.completions.create(model=ID, messages=question, **options)
                stream = client.chat.completions.create(model=ID, messages=question, stream=True, **options)
                streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
            assert server.end(signal.SIGTERM) == 0
    assert streamed == whole.choices[0].message.content and streamed
    assert f"downloading {ID}" in server.text()
