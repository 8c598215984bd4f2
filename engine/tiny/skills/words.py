"""Closed lists that the skills draw from: everyday words, names, both languages. Short words, so few tokens."""

from __future__ import annotations


def listed(text: str) -> tuple[str, ...]:
    """The words of a text, in order; "_" stands for a space within one."""
    return tuple(word.replace("_", " ") for word in text.split())


# keys of look-ups, items to copy, reverse and count
WORDS: tuple[str, ...] = listed(
    """
    ant ape arm art ash axe baby back bag ball band bank bar barn bat bath bean bear bed bee beer bell belt bench bike
    bill bird boat body bolt bone book boot bowl box boy brain bread brick bride brush bus bush cab cake calf camel camp
    can card cart case cat cave chain chair chalk cheek chess chin city clay clock cloth cloud coal coat code coin comb
    cook cork corn cow crab cream crow crown cube cup dad dance deer desk dice dirt dish dock dog doll door dove dress
    drum duck dust eagle ear earth egg elbow elf eye face fan farm fence film fire fish flag flame floor flute fly foot
    fork fox frog fruit game gate ghost giant gift girl glass glove glue goat gold goose grape grass guitar gun hall ham
    hand harp hat hawk head heart hen hill hoe home honey hook horn horse hotel house ice ink iron jam jar jeep jet
    judge juice key king kite knee knife knot lady lake lamb lamp land leaf leg lemon lid lily lime lion lip lock log
    magic mango map mask meat melon milk mill mine mint mole money monk moon moose moth mouse mouth mud mug nail neck
    nest net night noise nose nurse nut oak oar ocean oil olive onion orange oven owl page paint palm pan panda paper
    park path peach pear pen pie pig pilot pin pine pipe plane plant plate plum pond pony pool pot prize puppy queen
    rain rat rice ring river road robe rock roof room root rope rose rug sail salad salt sand scarf seal seat seed shark
    sheep shell ship shirt shoe shop silk skirt sky sled smoke snail snake snow soap sock sofa soup spoon squid stairs
    star steam steel stem stick stone stool storm sugar suit sun swan table tail tank taxi tea tent thumb tiger toad
    toast tooth torch towel tower toy train tray tree truck trunk tube tulip tuna van vase vest wagon wall watch water
    wave web whale wheat wheel wind wine wing wolf wood wool worm yard zebra zoo
    """
)
WORDS_ZH: tuple[str, ...] = listed(
    "苹果 香蕉 橙子 葡萄 西瓜 桃子 梨 草莓 米饭 面条 面包 牛奶 茶 水 鸡蛋 鱼 猫 狗 马 牛 羊 鸟 兔子 老虎 大象 "
    "桌子 椅子 书 笔 纸 灯 门 窗 床 杯子 碗 车 船 飞机 花 草 树 山 河 海 太阳 月亮 星星 雨 雪"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
NAMES: tuple[str, ...] = listed(
    """
    Adam Alice Amy Anna Ben Bob Carl Chris Clara Daisy David Emma Eric Eva Frank Grace Hana Henry Iris Jack Jane John
    Julia Karen Kevin Laura Leo Lily Lucy Maria Mark Mary Max Mia Nina Noah Oliver Oscar Paul Peter Rosa Ruby Sam Sara
    Simon Sofia Tom Vera
    """
)
NAMES_ZH: tuple[str, ...] = listed(
    "小明 小红 小华 小丽 小刚 小芳 小军 小云 小雨 小雪 小龙 小凤 王伟 李娜 张敏 刘洋 陈静 杨帆 赵磊 黄丽 周杰 吴凡 "
    "徐晴 孙悦 马超 朱琳 胡军 郭涛 何洁 林峰"
)
