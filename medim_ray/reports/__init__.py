"""Report understanding: sections and sentences, MeSH vocabulary, mentions with assertion, word <-> token alignment.

Pure text functions (MedIM section 3.1 needs flagged words and sentences); no torch and no ray below this package.
"""
