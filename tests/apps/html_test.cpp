// What a policy may have written, put into a page.
#include "apps/output/html.h"

#include <gtest/gtest.h>

#include <chrono>

#include "base/text.h"

namespace perigee::apps {
namespace {

const std::vector<std::string>& hostile() {
  static const std::vector<std::string> texts = {
      "<script>alert(1)</script>",
      "</script><img src=x onerror=alert(1)>",
      "<!-- <script> --><![CDATA[ ]]>",
      "' onmouseover='alert(1)",
      "\" autofocus onfocus=\"alert(1)",
      "`${alert(1)}`",
      "&lt;b&gt; &#60; &amp",
      std::string("a\0b\0", 4),
      "\x1b[2J\x1b]0;title\x07\x08\x7f",
      "\r\n\t",
      "\xe2\x80\xaetxt.exe\xe2\x81\xa6\xe2\x81\xa9\xd8\x9c",  // turned round
      "\xe2\x80\xa8\xe2\x80\xa9\xef\xbb\xbf",                 // line separators, a byte order mark
      "\xff\xfe\x80\xc0\xaf\xed\xa0\x80\xf4\x90\x80\x80\xe2\x82",  // not UTF-8
      "\xe6\x97\xa5\xe6\x9c\xac \xf0\x9f\x9a\x80 e\xcc\x81",
      "javascript:alert(1)",
      "]]>{{constructor.constructor('alert(1)')()}}",
  };
  return texts;
}

TEST(Html, LeavesNoMarkupAndNothingHidden) {
  for (const std::string& text : hostile()) {
    const std::string out = escape_html(text);
    EXPECT_TRUE(is_utf8(out)) << out;
    for (const char c : {'<', '>', '"', '\'', '`'}) EXPECT_EQ(out.find(c), std::string::npos) << out;
    for (const char c : out) EXPECT_TRUE(static_cast<unsigned char>(c) >= 0x20 || c == '\n' || c == '\t') << out;
    for (size_t at = out.find('&'); at != std::string::npos; at = out.find('&', at + 1)) {
      const size_t end = out.find(';', at);
      ASSERT_NE(end, std::string::npos) << out;
      const std::string name = out.substr(at, end + 1 - at);
      EXPECT_TRUE(name == "&amp;" || name == "&lt;" || name == "&gt;" || name == "&quot;" || name == "&#39;" ||
                  name == "&#96;")
          << out;
    }
  }
  EXPECT_EQ(escape_html("<a href=\"x\">&'`"), "&lt;a href=&quot;x&quot;&gt;&amp;&#39;&#96;");
  EXPECT_EQ(escape_html("\xe2\x80\xae\xff" + std::string(1, '\0')), "\\u{202e}\\xff\\x00");
  EXPECT_EQ(escape_html("one\n\ttwo \xe6\x97\xa5"), "one\n\ttwo \xe6\x97\xa5");
}

TEST(Html, ScriptJsonIsTheSameValueWithoutWhatEndsAScript) {
  for (const std::string& text : hostile()) {
    const nlohmann::json value = {{"text", text}, {text + "k", {1, 2.5, nullptr, true}}};
    const std::string out = script_json(value);
    for (const char c : out) {
      EXPECT_GE(c, 0x20) << out;
      EXPECT_TRUE(c != '<' && c != '>' && c != '&') << out;
    }
    // What a JSON parser reads is what went in, but for broken bytes.
    const std::string expected = value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    EXPECT_EQ(nlohmann::json::parse(out), nlohmann::json::parse(expected)) << out;
  }
  EXPECT_EQ(script_json("</script>\xe2\x80\xa8"), "\"\\u003c/script\\u003e\\u2028\"");
  EXPECT_EQ(script_json("\xff"), "\"\\ufffd\"");
}

// A line of a megabyte of the worst characters takes a fraction of a second: nothing is quadratic.
TEST(Html, TakesLongLines) {
  const auto start = std::chrono::steady_clock::now();
  for (const char* unit : {"<", "&", "\xff", "a", "\xe2\x80\xae", "\x01"}) {
    std::string text;
    while (text.size() < 1 << 20) text += unit;
    const std::string out = escape_html(text);
    EXPECT_GE(out.size(), text.size());
    EXPECT_GT(script_json(text).size(), text.size());
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
}

// The examples of FIPS 180-4 and lengths around a block's end.
TEST(Html, CspHashIsSha256) {
  EXPECT_EQ(csp_hash(""), "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='");
  EXPECT_EQ(csp_hash("abc"), "'sha256-ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0='");
  EXPECT_EQ(csp_hash("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "'sha256-JI1qYdIGOLjlwCaTDD5gOaM85Flk/yFn9uzt1BnbBsE='");
  EXPECT_EQ(csp_hash(std::string(55, 'a')), "'sha256-n0OQ+NMMLdkuyfCVtl4rmumwqSWlJY4kHJ8ekQ9zQxg='");
  EXPECT_EQ(csp_hash(std::string(56, 'a')), "'sha256-s1Q5pKxvCUi21vnjxq8PX1kM4g8b3nCQ73lwaG7Gc4o='");
  EXPECT_EQ(csp_hash(std::string(63, 'a')), "'sha256-fT50oF19sVvOStnsBljqmOPwbu7PFrTG//LaRX3cLzQ='");
  EXPECT_EQ(csp_hash(std::string(64, 'a')), "'sha256-/+BU/nrgy23GXDr5th1SCfQ5hR20PQulmXM33xVGaOs='");
  EXPECT_EQ(csp_hash(std::string(120, 'a')), "'sha256-Lz0zVDLHC1gK8Ojhs2dKfAINaDql9zqq7f3FWvkEwhw='");
}

}  // namespace
}  // namespace perigee::apps
