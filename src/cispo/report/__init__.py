"""Pictures of runs: the report with its token inspector, the live page, the terminal, forecasts and comparisons.

`runs.py` reads run folders; `tokens.py` turns rollout files into what the inspector shows; `page.py` makes the HTML;
`watch.py` serves the same page live and `tui.py` draws it in a terminal; `fit.py` and `forecast.py` extrapolate;
`compare.py` experiments. Nothing here writes into a run except `report.html`.
"""
