"""A labeler in a real browser: opens a project of Label Studio, fills its pages and submits or skips them."""

import contextlib

from playwright.sync_api import Page, sync_playwright

PATIENCE = 60_000  # milliseconds


@contextlib.contextmanager
def labeler(url, email, password, browser):
    """A browser with this account; gives its context, which makes pages."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        context = chromium.new_context(viewport={"width": 1360, "height": 1000})
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.goto(f"{url}/user/login")
        page.fill("input[name=email]", email)
        page.fill("input[name=password]", password)
        page.keyboard.press("Enter")
        page.wait_for_url(lambda found: "/user/login" not in found)
        page.close()
        yield context
        chromium.close()


def begin(page: Page, url, project, look=lambda: None):
    """The first task of a project, its instructions read, looked at and closed; gives their text."""
    page.goto(f"{url}/projects/{project}/data?labeling=1")
    read = page.get_by_text("Labeling Instructions")
    read.wait_for()
    text = page.locator("h1").last.locator("xpath=..").inner_text()
    page.wait_for_timeout(500)
    look()
    page.keyboard.press("Escape")
    read.wait_for(state="hidden")
    return text


def shown(page: Page, name):
    """The text of the first thing under a heading on the left, as a labeler sees it."""
    page.locator(".ig-left .lsf-richtext__line").first.wait_for()
    return page.locator(f".ig-left h4:text-is('{name}') + .lsf-object").inner_text()


def output(page: Page):
    return page.locator(".ig-output .lsf-richtext__container").inner_text()


def question(page: Page, title):
    return page.locator(".ig-ask").filter(has=page.locator(f"h4:text-is('{title}')"))


def rate(page: Page, title, stars):
    question(page, title).locator(".ant-rate-star").nth(stars - 1).click()


def tick(page: Page, title, *labels):
    for label in labels:
        question(page, title).locator(f'input[name^="{label}"]').first.check(force=True)


def write(page: Page, title, text):
    question(page, title).locator("textarea").fill(text)


def turn(page: Page):
    """The next output."""
    page.locator(".ig-right .lsf-pagination__btn_arrow-right").first.click()


def rank(page: Page, columns):
    """Drags each output, by its letter, into its column."""
    page.locator(".ig-ranking").scroll_into_view_if_needed()
    page.locator(".htx-ranker-column").first.evaluate("column => column.scrollIntoView({block: 'center'})")
    for letter, column in columns.items():
        item, place = page.locator(f'[data-ranker-id="{letter}"]'), page.locator(".htx-ranker-column").nth(column)
        begin, end = item.bounding_box(), place.bounding_box()
        page.mouse.move(begin["x"] + 20, begin["y"] + 15)
        page.mouse.down()
        page.mouse.move(begin["x"] + 30, begin["y"] + 20, steps=4)
        page.mouse.move(end["x"] + end["width"] / 2, end["y"] + 70, steps=10)
        page.wait_for_timeout(200)
        page.mouse.up()
        place.locator(f'[data-ranker-id="{letter}"]').wait_for()
        page.wait_for_timeout(500)  # until it has been dropped


def submit(page: Page):
    with page.expect_response(lambda answer: "/annotations" in answer.url and answer.request.method == "POST"):
        page.get_by_test_id("bottombar-submit-button").click()


def skip(page: Page):
    with page.expect_response(lambda answer: "/annotations" in answer.url and answer.request.method == "POST"):
        page.get_by_test_id("bottombar-skip-button").click()
