"""Why a run ends, in words for a person."""

#: By the word that stands in a summary's ``stop_reason``.
STOP_REASONS = {
    "uncertainty": "the wanted uncertainty was reached everywhere",
    "points": "the budget of points was spent",
    "dose": "the budget of dose was spent",
    "time": "the budget of time was spent",
    "all-measured": "every position of the map was exposed",
    "no-usable-measurement": "no measurement could be trusted",
}
