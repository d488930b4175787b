"""Offline evaluation: the same agents and the same scorers on stored questions, before a version goes live.

``rows`` reads what is to be asked, ``replay`` stands in for tools that cannot be called again, ``mlflows`` knows where
MLflow is, ``selection`` says which scorers apply, ``evaluate`` runs it all by ``mlflow.genai.evaluate``, ``cases``
says what came of each row, ``gate`` whether that is good enough, ``baseline`` whether it is no worse than before, and
``reporting`` tells people and machines.
"""
