"""The guided tour of `nest demo`: the whole workflow on synthetic speech, without downloads.

A folder and overrides come in; a corpus, a trained run, pictures and `index.html` come out. `synthesis.py` speaks
through espeak-ng, `corpus.py` writes speech and noise, `page.py` and `pictures.py` show the results. Start with
`tour.py`, which runs the steps in order.
"""
