#!/usr/bin/env python3
"""Trains the small tokenizers of tests/fixtures/tokenizers and writes what they answer.

    pip install -r tests/python/requirements.txt
    tests/python/make_tokenizer_fixtures.py

Every tokenizer NAME.model (SentencePiece) or NAME.json (Hugging Face) is trained on pinocchio.txt, two
chapters of a public-domain translation (Project Gutenberg 500). NAME.expected.jsonl holds one JSON
list a line: text, its ids without special tokens, the text of these ids; after an empty line: ids drawn at
random and their text.
"""

import io
import json
import random
from pathlib import Path

import sentencepiece
from nasty_lines import NASTY
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "tokenizers"
TEXT = (FOLDER / "pinocchio.txt").read_text()
LINES = [line for line in TEXT.split("\n") if line]

LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def train_sentencepiece(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, minloglevel=2, num_threads=1,
        hard_vocab_limit=False, **options)
    return model.getvalue()


def rules():
    """A few normalisation rules, among them ones that share a start, insert and delete text."""
    pairs = [("\ufb01", "fi"), ("\u00a0", " "), ("\t", " "), ("\n", " "), ("\r", " "), ("\u3000", " "), ("e\u0301", "\u00e9"),
             ("\u0301", ""), ("...", "\u2026"), ("..", ":"), ("\u00bd", "1/2"), ("\uff21", "A"),
             ("\u200b", ""), ("a\u0300\u0301", "\u00e1")]
    path = FOLDER / "rules.tsv"
    path.write_text("".join(f"{' '.join(f'{ord(c):X}' for c in source)}\t"
                            f"{' '.join(f'{ord(c):X}' for c in target)}\n" for source, target in pairs))
    return path


def sentencepiece_models():
    yield "bpe-byte-fallback", train_sentencepiece(
        model_type="bpe", vocab_size=700, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True)
    tsv = rules()
    yield "bpe-user-defined", train_sentencepiece(
        model_type="bpe", vocab_size=500, normalization_rule_tsv=str(tsv), add_dummy_prefix=False,
        user_defined_symbols=["<mark>", "ab", "aba", "  ", "ing "], control_symbols=["<ctl>"])
    yield "unigram", train_sentencepiece(
        model_type="unigram", vocab_size=500, normalization_rule_tsv=str(tsv),
        user_defined_symbols=["<mark>", "ab", "aba", "\U0001F600\U0001F600"], control_symbols=["<ctl>"])
    tsv.unlink()
    yield "unigram-byte-fallback", train_sentencepiece(
        model_type="unigram", vocab_size=700, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_by_whitespace=False, bos_id=-1, eos_id=-1)


def train(tokenizer, trainer):
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def hugging_face_pipelines():
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    train(byte_level, trainers.BpeTrainer(vocab_size=500, special_tokens=["<s>", "</s>"],
                                          initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    byte_level.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    yield "byte-level", byte_level

    # As converted from Llama 2: the whole text is one word, an unknown character becomes bytes.
    llama = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    llama.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    llama.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(" ", 1, 0)])
    train(llama, trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]))
    layout = json.loads(llama.to_str())
    layout["pre_tokenizer"] = None
    layout["normalizer"] = {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]}
    layout["added_tokens"] = layout["added_tokens"][:3]
    yield "llama", Tokenizer.from_str(json.dumps(layout))

    llama3 = Tokenizer(models.BPE())
    llama3.normalizer = normalizers.NFC()
    llama3.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    llama3.decoder = decoders.ByteLevel()
    train(llama3, trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    llama3.add_special_tokens([AddedToken("<|begin|>"), AddedToken("<|end|>", rstrip=True),
                               AddedToken("<mask>", lstrip=True)])
    llama3.add_tokens([AddedToken("a b", normalized=False), AddedToken("\n\n\n", normalized=False)])
    yield "llama-3", llama3

    metaspace = Tokenizer(models.Unigram())
    metaspace.normalizer = normalizers.NFKC()
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    metaspace.decoder = decoders.Metaspace(prepend_scheme="first")
    yield "metaspace", train(metaspace, trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>"], unk_token="<unk>", show_progress=False))

    word_piece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    word_piece.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Lowercase()])
    word_piece.pre_tokenizer = pre_tokenizers.Whitespace()
    word_piece.decoder = decoders.WordPiece()
    yield "word-piece", train(word_piece, trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"]))


def write_expected(name, encode, decode, size):
    generator = random.Random(name)
    nasty = [text[:120] for text in NASTY]
    texts = LINES[:40] + nasty + ["".join(generator.sample(nasty, 3)) for _ in range(40)]
    texts += [f"x<ctl>y<mark> <mark>ababa <s>{text[:50]}" for text in texts[:60:4]]
    texts += ["a <|end|>  b\n<|begin|> c  <mask> d<mask>\n\n\n\n e a ba b <|end|> "]
    few = [generator.randrange(size) for _ in range(6)]
    drawn = [[generator.randrange(size) for _ in range(generator.randrange(20))] for _ in range(100)]
    # The first ids of a vocabulary are its special and byte tokens.
    drawn += [[generator.choice([*range(min(size, 262)), *few * 20]) for _ in range(12)] for _ in range(100)]
    with open(FOLDER / f"{name}.expected.jsonl", "w", encoding="utf-8") as file:
        for text in texts:
            ids = encode(text)
            print(json.dumps([text, ids, decode(ids)], separators=(",", ":")), file=file)
        print(file=file)
        for ids in drawn:
            print(json.dumps([ids, decode(ids)], separators=(",", ":")), file=file)


def main():
    for name, model in sentencepiece_models():
        (FOLDER / f"{name}.model").write_bytes(model)
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        write_expected(name, processor.encode, processor.decode, processor.get_piece_size())
    for name, tokenizer in hugging_face_pipelines():
        (FOLDER / f"{name}.json").write_text(tokenizer.to_str())
        write_expected(name, lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
                       tokenizer.decode, tokenizer.get_vocab_size())


if __name__ == "__main__":
    main()
