"""Follows an alias of the registry: starts a new version beside the old one, gives it a share, switches or drops it.

    settings.py      what can be set                      record.py      what Serve remembers of a rollout
    app.py           the Serve application, its loop      steps.py       what is to be done next (pure)
    serve_config.py  Serve's config, read and changed     warming.py     a new version's first requests
    rollout.py       does the steps                       judgement.py   switch, drop or wait (pure), with bounds.py

Called by: Ray Serve, through `swiftkv.serving.rollout.app:build_rollout_app` of a config file.
"""
