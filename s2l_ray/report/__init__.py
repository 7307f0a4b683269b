"""A run -> one page that shows what was chosen, what it cost and whether it was worth it.

Takes a run directory, finished or not; gives `report/index.html`, one file that may be built again at any time. Read `page`
(build and render; `page.html` has the order and the words), `reading` (a run's artifacts to facts), `wording` (its sentences
and tables), `facts` (the types), `plots` (the figures).
"""
