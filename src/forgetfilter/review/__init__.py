"""A person marks a few rows, and everything is ranked anew: `forgetfilter review`.

ranking.py ranks, asking.py chooses the rows to ask about, session.py puts both together with the run's marks, server.py
review.html and review.js show them in a browser.
"""
