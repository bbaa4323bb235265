"""Figures from judged answers: metrics, controls, intervals, tables, the page."""
