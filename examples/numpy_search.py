"""Search without a framework: numpy, and a file whose vectors are checked when it is opened.

python examples/numpy_search.py             # writes to a temporary folder
python examples/numpy_search.py rights.npz  # keeps the file for the next run
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from kalm_integrations import IdentityMismatchError, KalmClient, VectorIdentity

# Articles of the Universal Declaration of Human Rights, each in another language.
ARTICLES = {
    "1 (English)": "All human beings are born free and equal in dignity and rights.",
    "3 (Deutsch)": "Jeder hat das Recht auf Leben, Freiheit und Sicherheit der Person.",
    "5 (français)": "Nul ne sera soumis à la torture, ni à des peines cruelles ou inhumaines.",
    "13 (español)": "Toda persona tiene derecho a salir de cualquier país y a regresar a su país.",
    "15 (italiano)": "Ogni individuo ha diritto ad una cittadinanza.",
    "18 (中文)": "人人有思想、良心和宗教自由的权利。",
    "23 (polski)": "Każdy człowiek ma prawo do pracy i do swobodnego wyboru pracy.",
    "24 (日本語)": "すべて人は、休息及び余暇をもつ権利を有する。",
    "26 (português)": "Todo ser humano tem direito à instrução.",
}
QUESTIONS = ["May I leave my country?", "holidays and leisure", "Is torture allowed?"]


def build(client: KalmClient, texts: list[str]) -> np.ndarray:
    """Return vectors in the order of the texts. Parts arrive in any order."""
    vectors = np.empty((len(texts), client.vector_dimensions), dtype=client.config.vector_dtype)
    for part in client.iter_embed(texts):  # any iterable works, even a file larger than memory
        vectors[part.indices] = part.packed
    return vectors


def save(path: Path, names: list[str], vectors: np.ndarray, client: KalmClient) -> None:
    """Store the identity with the vectors, so that `load` can check them.

    For other models over HTTP, set `expected_identity=` before you save: docs/identity.md.
    """
    identity = json.dumps(client.vector_identity.to_dict())
    with path.open("wb") as file:  # np.savez alone would append .npz to the name
        np.savez(file, names=names, vectors=vectors, identity=identity)


def load(path: Path, client: KalmClient) -> tuple[list[str], np.ndarray]:
    """Return names and vectors, if they are comparable with vectors of `client`."""
    with np.load(path) as file:
        stored = VectorIdentity.from_dict(json.loads(str(file["identity"])))
        client.vector_identity.check(stored)  # the error shows the difference
        return file["names"].tolist(), file["vectors"]


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else Path(tempfile.mkdtemp()) / "rights.npz")
    # A small model in this process, to learn with. In production, the service that you run:
    # KalmClient(base_url="https://...", api_key="...")
    with KalmClient(backend="local") as client:
        if not path.exists():
            save(path, list(ARTICLES), build(client, list(ARTICLES.values())), client)
            print(f"Wrote {len(ARTICLES)} vectors to {path}")
        names, vectors = load(path, client)
        print(f"Read {vectors.shape[0]} {vectors.dtype} vectors of {vectors.shape[1]} dimensions\n")

        # Unit vectors: the inner product is the cosine.
        scores = client.embed(QUESTIONS, role="query").vectors @ vectors.T.astype(np.float32)
        for question, row in zip(QUESTIONS, scores, strict=True):
            best = ", ".join(f"{names[i]} {row[i]:.2f}" for i in np.argsort(-row)[:3])
            print(f"{question:<24} article {best}")

    # A document instruction changes the vectors, so this client must not use the file.
    other = KalmClient(backend="local", document_instruction="sts")
    try:
        load(path, other)
    except IdentityMismatchError as error:
        print(f"\nRefused, as it should be: {error}")


if __name__ == "__main__":
    main()
