"""The words that an explanation needs, in English and Portuguese; docs/glossary.md and docs/glossario.md say more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

LANGUAGES = ("en", "pt")
DOCS = {"en": "docs/glossary.md", "pt": "docs/glossario.md"}


class Term(NamedTuple):
    """A word and one or two sentences about it."""

    word: str
    meaning: str


def anchor(word: str) -> str:
    """Where Markdown puts the heading of a word: lower case, spaces as dashes, nothing else."""
    return "".join("-" if c == " " else c for c in word.lower() if c.isalnum() or c in " -_")


TERMS: Mapping[str, Mapping[str, Term]] = {
    "token": {
        "en": Term("Token", "A piece of text that the model reads and writes as one: a word, a part of one, a sign."),
        "pt": Term(
            "Token", "Um pedaço de texto que o modelo lê e escreve como um só: uma palavra, parte dela, um sinal."
        ),
    },
    "id": {
        "en": Term("Token id", "The number by which the model knows a token: its row in the embedding."),
        "pt": Term("Id de token", "O número pelo qual o modelo conhece um token: a linha dele no embedding."),
    },
    "embedding": {
        "en": Term(
            "Embedding", "The table that turns each token id into a list of numbers, a vector, to compute with."
        ),
        "pt": Term(
            "Embedding", "A tabela que transforma cada id de token numa lista de números, um vetor, para calcular."
        ),
    },
    "cosine": {
        "en": Term(
            "Cosine similarity", "How nearly two vectors point the same way: 1 the same, 0 unrelated, -1 opposite."
        ),
        "pt": Term(
            "Similaridade de cosseno",
            "Quanto dois vetores apontam para o mesmo lado: 1 o mesmo, 0 sem relação, -1 o oposto.",
        ),
    },
    "layer": {
        "en": Term("Layer", "One step of the model: attention, then a feed-forward part; each adds to the stream."),
        "pt": Term(
            "Camada", "Um passo do modelo: atenção e depois uma parte feed-forward; cada uma soma algo ao fluxo."
        ),
    },
    "stream": {
        "en": Term(
            "Residual stream", "The vector that travels through all layers at each token, and that each adds to."
        ),
        "pt": Term(
            "Fluxo residual", "O vetor que atravessa todas as camadas em cada token, e ao qual cada uma soma algo."
        ),
    },
    "attention": {
        "en": Term(
            "Attention", "How a token gathers what it needs from the tokens before it, in shares that sum to 1."
        ),
        "pt": Term("Atenção", "Como um token reúne o que precisa dos tokens anteriores, em parcelas que somam 1."),
    },
    "head": {
        "en": Term(
            "Attention head", "One of several attentions that a layer runs side by side, each with an eye of its own."
        ),
        "pt": Term(
            "Cabeça de atenção", "Uma das várias atenções que uma camada faz lado a lado, cada uma com olhar próprio."
        ),
    },
    "sink": {
        "en": Term(
            "Attention sink", "A token, mostly the first, at which heads look when they have nothing to look for."
        ),
        "pt": Term(
            "Sumidouro de atenção",
            "Um token, quase sempre o primeiro, para o qual as cabeças olham quando nada procuram.",
        ),
    },
    "logit": {
        "en": Term(
            "Logit", "The score that the model gives a token as the next one, before scores become probabilities."
        ),
        "pt": Term(
            "Logit", "A nota que o modelo dá a um token como o próximo, antes de as notas virarem probabilidades."
        ),
    },
    "probability": {
        "en": Term("Probability", "A token's share of all chances to come next; softmax makes it of the logits."),
        "pt": Term(
            "Probabilidade", "A parte de um token em todas as chances de ser o próximo; o softmax a faz dos logits."
        ),
    },
    "lens": {
        "en": Term(
            "Logit lens", "What the model would say if it stopped at a layer: the head applied to the stream there."
        ),
        "pt": Term(
            "Lente de logits", "O que o modelo diria se parasse numa camada: a saída final aplicada ao fluxo dali."
        ),
    },
}

WORDS: Mapping[str, Mapping[str, str]] = {  # labels of what is shown
    "en": {
        "tokens": "Tokens", "next": "What comes next", "lens": "How the prediction forms",
        "attention": "Who looks at whom",
        "near": "Nearest tokens", "likeness": "The same word, twice", "glossary": "Words",
        "tokens_note": "The text as the model gets it: {count} pieces, each with its number.",
        "next_note": "The likeliest tokens behind the text.",
        "lens_note": "Behind {token}: what the model would say if it stopped after each layer; the answer is {answer}.",
        "attention_note": "Where {token} looks, over all heads of all layers; much goes to the first token, "
        "a resting place.",
        "heads_note": "Heads that look hardest:", "head_row": "layer {layer}, head {head}",
        "near_note": "Tokens whose embeddings point most nearly the same way.",
        "likeness_note": "How alike the streams are at {first} and {other}: 1 at first, less where the text "
        "around counts.",
        "stage0": "embedding", "layer": "layer", "answer": "answer", "rank": "place",
        "all": "all", "heads": "heads",
        "touch": "Point at a token, or tap it: the shade shows where it looks.",
        "no_attention": "No layer of this model attends: they keep a state instead.", "more": "More in {docs}.",
        "explained": "explained",
    },
    "pt": {
        "tokens": "Tokens", "next": "O que vem depois", "lens": "Como a previsão se forma",
        "attention": "Quem olha para quem",
        "near": "Tokens mais próximos", "likeness": "A mesma palavra, duas vezes", "glossary": "Palavras",
        "tokens_note": "O texto como o modelo o recebe: {count} pedaços, cada um com seu número.",
        "next_note": "Os tokens mais prováveis depois do texto.",
        "lens_note": "Depois de {token}: o que o modelo diria se parasse em cada camada; a resposta é {answer}.",
        "attention_note": "Para onde {token} olha, em todas as cabeças de todas as camadas; muito vai ao primeiro "
        "token, um lugar de descanso.",
        "heads_note": "Cabeças que olham com mais força:", "head_row": "camada {layer}, cabeça {head}",
        "near_note": "Tokens cujos embeddings apontam quase para o mesmo lado.",
        "likeness_note": "Quanto os fluxos se parecem em {first} e {other}: 1 no início, menos onde o "
        "contexto conta.",
        "stage0": "embedding", "layer": "camada", "answer": "resposta", "rank": "lugar",
        "all": "todas", "heads": "cabeças",
        "touch": "Aponte para um token, ou toque nele: a cor mostra para onde ele olha.",
        "no_attention": "Nenhuma camada deste modelo tem atenção: elas guardam um estado.", "more": "Mais em {docs}.",
        "explained": "explicado",
    },
}  # fmt: skip
