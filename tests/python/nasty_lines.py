"""Strings on which tokenizers go wrong: white space, control characters, scripts, long runs."""

NASTY = [
    "", " ", "  ", "\t", "\n", "\r\n", "\n\n\n", " \n ", "\u00a0", "\u3000", "\u2581", " \u2581 a",
    "a", " a", "  a", "a ", "a  ", "   a   b   ", "\ta\tb\t", "a\r\nb\r\n\r\nc", "a\n\nb", "\x00", "a\x00b",
    "\x01\x02\x1f\x7f\x85", "\ufeffabc", "\ufffd", "\ufffe", "\u200b\u200d\u2060", "soft\u00adhyphen",
    "\U0001F600", "\U0001F468\u200d\U0001F469\u200d\U0001F467", "\U0001F1E9\U0001F1EA", "\U0010FFFF", "\U00012000",
    "e\u0301", "\u0301", " \u0301", "a\u0300\u0301\u0302\u0303b", "\u1e9b\u0323", "\ufb01 \u2460 \u00bd \u33a5", "\u00c5\u212b",
    "\uac00\u1100\u1161\u11a8", "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd", "\u0645\u0631\u062d\u0628\u0627",
    "\u202eabc\u202c", "\u4f60\u597d\uff0c\u4e16\u754c\u3002", "\u3053\u3093\u306b\u3061\u306f", "\ud55c\uad6d\uc5b4 \ubb38\uc7a5",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "na\u00efve caf\u00e9 \u00dcber stra\u00dfe",
    "<s>", "</s>", "<unk>", "a<s>b</s> c <unk>", "<0x0A>", "<0x41>x", "[INST] hi [/INST]", "<|endoftext|>",
    "x" * 900, "ab" * 500, " " * 700, "\n" * 300, "\u2581" * 200, "a " * 400, "\U0001F600" * 100, "\u4e00" * 300,
    "don't I'LL we've he'd", "1234567890 3.14159 1,000,000", "!!!???...---", "a.\n\nb!\n c?\n\n d",
    "HTTP://example.com/a?b=c&d=%20#e", "if (x<0x10) { y = \"\\n\"; }", "\\u0041 &amp; \ud7ff\ue000",
]
